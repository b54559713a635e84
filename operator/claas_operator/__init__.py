"""The control loop of CLaaS and the `claas` command. Never imports torch, nor the worker."""
