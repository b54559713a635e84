"""The contract of CLaaS: the two resources, their names and their reasons. Imports pydantic and nothing else."""
