"""Long work: what is to be solved, in which order, on which machine, kept on disk as it is done."""
