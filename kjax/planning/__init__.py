"""The parts of `kjax plan`: the traced step's memory, machines, sizes, times, advice, the report."""
