"""The teacher: vLLM's own OpenAI server with the routes of `plugin`, and what others need to talk to it.

Server side: `__main__` (the command), `defaults` (flags and environment it fills in), `plugin` (readiness and info).
Other side: `client`, `scores` and `errors` (numpy and httpx only), `fingerprint` (standard library only).
"""
