"""Random input of every kind a person or a damaged disk can give: the answer is a result, or one sentence and its exit
code.

The same examples each time, so that a failure is not a matter of luck; all fuzzers together take about a minute and a
half.
"""
