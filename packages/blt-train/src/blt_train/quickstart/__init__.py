"""From raw text to a trained BLT and a report in one command, on a laptop."""
