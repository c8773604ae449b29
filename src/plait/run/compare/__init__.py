"""Comparisons as measurements: is B better than A, by how much, and could it have been seen?

statistics  paired differences, intervals, verdicts, the smallest detectable difference
study       the file of a comparison: arms, rates, seeds, and the runs that they make
runner      runs them, in processes, none twice
outcome     each arm's rate and verdict
published   peft's published results, with intervals; page writes them as Markdown and HTML
"""
