"""Comparisons as measurements: is B better than A, by how much, and could it have been seen?

study       the file of a comparison: arms, rates, seeds, factors, and the runs that they make
match       each arm's rank, so that all have about the same size
tuning      each arm's rate, chosen on validation rows with equal trials
transfer    a rate that is carried over from the reference to another method
runner      runs trials, none twice, in workers; warm is what a worker keeps
outcome     rates, verdicts and facts: the results, as results.json
statistics  paired differences, intervals, verdicts, the smallest detectable difference
plan        what a study can detect and what it takes, before it runs
report      HTML, Markdown and peft's form of the results, from tables and pictures
published   peft's published results, with intervals; page writes them as Markdown and HTML
"""
