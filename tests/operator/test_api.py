"""How the operator reaches the API server."""

from __future__ import annotations

import pytest
from kubernetes.aio import client

from claas_operator.api import Api


@pytest.mark.parametrize(
    ("excepted", "proxy"), [("", "http://proxy.example.com:3128"), ("10.0.0.1", None), ("api.example.com", None)]
)
async def test_the_proxy_of_the_environment_is_used_where_it_is_meant(
    monkeypatch: pytest.MonkeyPatch, excepted: str, proxy: str | None
) -> None:
    """It is looked up once: at every call it would cost as much as the call."""
    monkeypatch.setenv("https_proxy", "http://proxy.example.com:3128")
    monkeypatch.setenv("no_proxy", excepted)
    host = excepted or "10.0.0.1"
    configuration = client.Configuration(host=f"https://{host}:6443")
    api = Api(configuration)
    try:
        assert configuration.proxy == proxy
        assert api._client.rest_client.proxy == proxy
        assert not api._client.rest_client.pool_manager.trust_env
    finally:
        await api.close()
