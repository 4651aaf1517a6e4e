"""Starting training jobs of several processes on one or more nodes, and telling how they end.

`options` says what a user can choose, `job` runs one node's share of a job through torchrun's agent (`agent`), `board`
is where the launchers of all nodes tell each other of failures, `failures` finds the one that caused the others, and
`rank` is the part of it that runs in the training processes.
"""
