"""The REST door: a FastAPI application that turns every call into one of the two resources, and waits for its end.

`models` is the wire, `routes` the handlers, `spec` the way from a body to a resource and back, `informer` the one watch
that serves every waiting caller, `auth` who may do what. Nothing here schedules, and nothing is kept: a killed shim's
callers get their answer from the next one.
"""
