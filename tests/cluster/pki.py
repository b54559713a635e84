"""A certificate authority in a folder, with the openssl command: Python's standard library signs nothing."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.process import run

CONFIG = """\
[req]
distinguished_name = subject
x509_extensions = extensions
[subject]
[extensions]
"""
EC_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc"]


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key."""

    certificate: Path
    key: Path


class Authority:
    """Issues the certificates of one cluster; those that its folder already holds are used again.

    Attributes:
        certificate: the authority's own.
        service_account_key: signs service-account tokens.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        self.folder = folder
        own = self._pair(
            "ca", "/CN=claas-test-ca", ["basicConstraints = critical, CA:true", "keyUsage = critical, keyCertSign"], []
        )
        self.certificate, self._own = own.certificate, own
        self.service_account_key = folder / "service-account.key"
        if not self.service_account_key.exists():
            # ecparam, not genpkey: the API server does not find the public key in a PKCS #8 file
            run(
                ["openssl", "ecparam", "-genkey", "-noout", "-name", "prime256v1", "-out", self.service_account_key],
                seconds=30,
            )

    def issue(self, name: str, user: str, *, groups: Sequence[str] = (), hosts: Sequence[str] = ()) -> Pair:
        """A certificate for client and server use.

        Args:
            name: of its files.
            user, groups: whom the API server takes its bearer for (common name, organizations).
            hosts: ``IP:…`` and ``DNS:…`` under which its bearer serves.
        """
        extensions = ["basicConstraints = critical, CA:false", "extendedKeyUsage = serverAuth, clientAuth"]
        if hosts:
            extensions.append("subjectAltName = " + ", ".join(hosts))
        subject = "".join(f"/O={group}" for group in groups) + f"/CN={user}"
        return self._pair(name, subject, extensions, ["-CA", str(self._own.certificate), "-CAkey", str(self._own.key)])

    def _pair(self, name: str, subject: str, extensions: Sequence[str], signer: Sequence[str]) -> Pair:
        pair = Pair(self.folder / f"{name}.crt", self.folder / f"{name}.key")
        if not pair.certificate.exists():
            config, unfinished = self.folder / f"{name}.cnf", self.folder / f"{name}.part"
            config.write_text(CONFIG + "\n".join(extensions) + "\n")
            command: list[str | Path] = ["openssl", "req", "-x509", *EC_KEY, "-days", "365", *signer]
            command += ["-subj", subject, "-config", config, "-keyout", pair.key, "-out", unfinished]
            run(command, seconds=30)
            os.rename(unfinished, pair.certificate)  # last: where it exists, its key does too
            config.unlink()
        return pair
