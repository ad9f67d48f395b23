"""From a run's sources to compiled data sets, once for all runs that use them alike."""
