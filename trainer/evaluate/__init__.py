"""`capstan evaluate` and `capstan generate` on each rank. measure/ has the measurements that a training makes too."""
