"""One candidate of a benchmark, in a process of its own: loads a model, and does one repetition whenever it is told.

    python FOLDER    this one; requests on stdin, answers on stdout, one line of JSON each

Only `own` imports fewbits: the other engines run in a Python that may not have it.
"""
