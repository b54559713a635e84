"""The teacher: vLLM's own OpenAI server with the routes of `plugin`, and what others need to talk to it.

Server side: `__main__` (the command), `defaults` and `memory` (flags and environment it fills in), `plugin` (routes),
`admission` (who scores next), `engine` (vLLM's), `metrics`.
Other side: `client`, `replicas`, and what both share: `wire`, `scores`, `limits`, `errors` (numpy and httpx only);
`fingerprint` (standard library only).
"""
