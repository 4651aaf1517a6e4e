"""What a run takes, from its config alone: parameters, arithmetic, memory, time."""
