"""The studies behind the figures in the docs; run one as `python -m benchmarks.STUDY.SCRIPT`."""
