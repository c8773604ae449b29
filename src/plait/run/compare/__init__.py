"""Comparisons as measurements: is B better than A, by how much, and could it have been seen?

statistics  paired differences, intervals, verdicts, the smallest detectable difference
published   peft's published results, with intervals
"""
