"""The contract of CLaaS: the two resources, their names and reasons. Needs pydantic (its generator: PyYAML too)."""
