"""Diagnostics of a trained adapter: pure functions on tensors, in fp64, without files.

update: a dW as factors or dense. similarity: cosines and principal angles. spectrum: ranks of a dW.
direction: where it lies in W's singular subspaces. routing: load and entropy of a token router.
"""
