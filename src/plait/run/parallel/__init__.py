"""A run on several processes.

place     what a launcher's environment says: which process this is, of how many
launcher  `plait train FILE --processes N` starts them on this machine
ranks     joining them, and what they agree on
arguments what they need of the training section
rows      which rows of a batch a process trains on
sharded   FSDP2 through accelerate
"""
