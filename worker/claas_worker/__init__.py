"""The worker: one SDPO step on one adapter, the contexts it is scored in, and the agent that runs bound requests."""
