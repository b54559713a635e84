"""A teacher without a model: readiness, what it is, and frames that any sample gets the same numbers in."""

from __future__ import annotations

import numpy as np
from aiohttp import web

from claas_teacher import wire
from claas_teacher.scores import canonical

INFO = {
    "model": "teacher",
    "tokenizer_fingerprint": "f" * 64,
    "vocab_size": 1000,
    "max_logprobs": 100,
    "max_model_len": 256,
    "wire_version": wire.VERSION,
    "request_tokens": 4096,
    "queue_tokens": 0,
}


async def serve() -> tuple[web.AppRunner, str]:
    """A running one, to be cleaned up, and its url. Its failures are the proxy's before it."""
    app = web.Application()

    async def ready(_: web.Request) -> web.Response:
        return web.Response()

    async def info(_: web.Request) -> web.Response:
        return web.json_response(INFO)

    async def score(request: web.Request) -> web.Response:
        frame = await request.read()
        asked = wire.decode_request(frame)
        answer = wire.Answer(asked, frame)
        for number, sample in enumerate(asked.samples):
            others = np.tile(np.arange(asked.width), (len(sample.response), 1))
            ids = np.concatenate([np.asarray(sample.response)[:, None], others], axis=1)
            answer.put(number, canonical(ids, np.full(ids.shape, -2.0) - ids / 100))
        return web.Response(body=bytes(answer.frame), content_type=wire.MEDIA_TYPE)

    app.router.add_get("/claas/v1/ready", ready)
    app.router.add_get("/claas/v1/info", info)
    app.router.add_post("/claas/v1/score", score)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    return runner, f"http://{host}:{port}"
