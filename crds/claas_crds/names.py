"""Every name that two parts of CLaaS must spell alike: the API group, labels, annotations, the lease's fields."""

from __future__ import annotations

from typing import Final

GROUP: Final = "claas.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"
CATEGORY: Final = "claas"

ADAPTER_KIND: Final = "LoraAdapter"
ADAPTER_PLURAL: Final = "loraadapters"
REQUEST_KIND: Final = "DistillRequest"
REQUEST_PLURAL: Final = "distillrequests"

# Labels, on everything that the operator creates.
INSTANCE_LABEL: Final = "app.kubernetes.io/instance"  # the Helm release: two releases never touch each other's Jobs
COMPONENT_LABEL: Final = "app.kubernetes.io/component"
COMPONENT_WORKER: Final = "worker"
COMPONENT_OPERATION: Final = "operation"
COMPONENT_OPERATOR: Final = "operator"
POOL_LABEL: Final = f"{GROUP}/pool"
ADAPTER_UID_LABEL: Final = f"{GROUP}/adapter-uid"
OPERATION_LABEL: Final = f"{GROUP}/operation"
GENERATION_LABEL: Final = f"{GROUP}/generation"  # of the adapter, as it was when the operation's Job was made

# Kueue's own, on worker Jobs of a pool with a queueName.
KUEUE_QUEUE_LABEL: Final = "kueue.x-k8s.io/queue-name"

# The worker's Lease, named after its Pod: annotations, because a Lease's spec has no room for them.
LEASE_STATE: Final = f"{GROUP}/state"
LEASE_RUNNING: Final = f"{GROUP}/running"  # uids, comma-separated
STATE_STARTING: Final = "Starting"
STATE_READY: Final = "Ready"
STATE_DRAINING: Final = "Draining"
# How long a worker stays without work: on its Pod as it was started; on its Lease what the operator has told it since.
LINGER_SECONDS: Final = f"{GROUP}/linger-seconds"
# On a worker's Job and Pod: which settings of its pool it was started with, as a hash.
EDITION: Final = f"{GROUP}/edition"
# On the operator's ClusterRole: namespaces that its release serves, comma-separated, or "*".
OPERATOR_NAMESPACES: Final = f"{GROUP}/namespaces"

# Set by the operator on a worker's Pod template, read by `claas_worker`.
ENV_POOL: Final = "CLAAS_POOL"
ENV_INSTANCE: Final = "CLAAS_INSTANCE"
ENV_LINGER_SECONDS: Final = "CLAAS_LINGER_SECONDS"
ENV_MAX_REQUESTS: Final = "CLAAS_MAX_REQUESTS"
ENV_BATCH: Final = "CLAAS_BATCH"
ENV_BASE_MODEL: Final = "CLAAS_BASE_MODEL"
ENV_LEASE_SECONDS: Final = "CLAAS_LEASE_SECONDS"
ENV_POD_NAME: Final = "CLAAS_POD_NAME"
ENV_POD_NAMESPACE: Final = "CLAAS_POD_NAMESPACE"
ENV_POD_UID: Final = "CLAAS_POD_UID"
# Which namespaces' requests the worker watches: empty for all of them (a Shared pool).
ENV_WATCH_NAMESPACE: Final = "CLAAS_WATCH_NAMESPACE"

FINALIZER: Final = f"{GROUP}/delete-versions"
