"""The Python client of CLaaS: feedback on a response becomes a training step on your adapter. Needs pydantic and httpx.

    from claas_client import Client

    with Client("https://claas.example.com", api_key="…") as claas:
        claas.init_lora("s3://my-bucket/loras/user123/coder-v1/", name="coder")
        step = claas.distill(adapter="coder", prompt="…", response="…", feedback="Too long")
        print(step.lora_uri, step.metadata.total_loss)

`submit` does not wait: it gives a handle, to `wait` on, to follow (`events`) or to `cancel`. `AsyncClient` is the same
for asyncio. Every call has a time-out, and is tried again where that is safe. Problems are exceptions: see `errors`.
"""

from claas_client.client import AsyncClient, AsyncHandle, Client, Handle
from claas_client.errors import (
    AnswerInvalid,
    BadRequest,
    ClaasError,
    Conflict,
    ConnectionFailed,
    Forbidden,
    NotFound,
    ProblemError,
    RequestFailed,
    ServerProblem,
    TooManyRequests,
    Unauthorized,
    WaitTimeout,
)
from claas_client.models import (
    Adapter,
    Caller,
    DistillBody,
    Distilled,
    Event,
    FieldProblem,
    Health,
    Initialised,
    InitOptions,
    Limits,
    Lineage,
    LiteBody,
    LiteSample,
    Message,
    Metadata,
    Numbers,
    Part,
    ReasonMeaning,
    Request,
    Sample,
    Teacher,
    Timings,
    Training,
    Version,
    Workers,
)
from claas_client.retry import Retries

__all__ = [
    "Adapter",
    "AnswerInvalid",
    "AsyncClient",
    "AsyncHandle",
    "BadRequest",
    "Caller",
    "ClaasError",
    "Client",
    "Conflict",
    "ConnectionFailed",
    "DistillBody",
    "Distilled",
    "Event",
    "FieldProblem",
    "Forbidden",
    "Handle",
    "Health",
    "InitOptions",
    "Initialised",
    "Limits",
    "Lineage",
    "LiteBody",
    "LiteSample",
    "Message",
    "Metadata",
    "NotFound",
    "Numbers",
    "Part",
    "ProblemError",
    "ReasonMeaning",
    "Request",
    "RequestFailed",
    "Retries",
    "Sample",
    "ServerProblem",
    "Teacher",
    "Timings",
    "TooManyRequests",
    "Training",
    "Unauthorized",
    "Version",
    "WaitTimeout",
    "Workers",
]
