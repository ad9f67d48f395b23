"""`capstan evaluate` and `capstan generate` on each rank; measure/ is what a training measures of its model as well."""
