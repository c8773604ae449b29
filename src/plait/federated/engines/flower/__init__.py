"""Flower: the exchange over its network, its simulation on Ray, the switches it is started with."""
