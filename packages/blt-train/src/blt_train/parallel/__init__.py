"""Models over several processes: meshes, sharded weights and tables, recomputation, compilation, float8."""
