"""`capstan report`: one page that shows what a run did. It is made from the run's records alone."""
