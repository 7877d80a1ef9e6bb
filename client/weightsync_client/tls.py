"""Certificates of a publisher: which agents it believes, and what it shows them."""

from __future__ import annotations

import os
import ssl
from typing import Literal

from weightsync.errors import InputError
from weightsync_client.settings import tls_from_env

StrPath = str | os.PathLike[str]
Verify = ssl.SSLContext | StrPath | bool
Cert = StrPath | tuple[StrPath, StrPath]


def tls_context(verify: Verify = True, cert: Cert | None = None) -> ssl.SSLContext | Literal[True]:
    """What ``https`` agents are checked with, and what they get to see.

    Args:
        verify: PEM file of the CA that signs agents' certificates, or a context of your own;
            True: ``WEIGHTSYNC_CA_FILE``, and without it the CAs that the world trusts.
        cert: PEM file with certificate and key, or one file for each; None:
            ``WEIGHTSYNC_CERT_FILE`` and ``WEIGHTSYNC_KEY_FILE``, or none is shown.

    Returns:
        A context; True: nothing was said, httpx's own ways do.

    Raises:
        InputError: A file cannot be read, or they do not fit together.
    """
    if isinstance(verify, ssl.SSLContext):
        if cert is not None:
            raise InputError(
                "both a TLS context and a certificate", hint="load it: verify.load_cert_chain(...)"
            )
        return verify
    if verify is False:
        raise InputError(
            "verify=False would give the token to whoever answers",
            hint="verify='ca.pem', the CA that signed the agents' certificates",
        )
    env = tls_from_env()
    ca = env.ca if verify is True else verify
    pair = (
        (env.cert, env.key) if cert is None else (cert if isinstance(cert, tuple) else (cert, None))
    )
    if ca is None and pair[0] is None:
        return True
    try:
        context = ssl.create_default_context(cafile=ca)
        if pair[0] is not None:
            # without a passphrase of ours OpenSSL would ask the terminal for one
            context.load_cert_chain(pair[0], pair[1], password="")
    except (OSError, ssl.SSLError, ValueError) as error:
        names = ", ".join(str(name) for name in (ca, *pair) if name is not None)
        raise InputError(
            f"cannot use the TLS files {names}: {error}",
            hint="PEM files: the CA, the certificate with its chain, its key without a passphrase",
        ) from error
    return context


def tls_hint(error: Exception) -> str | None:
    """What to do about a connection that failed for its certificates; None: it did not."""
    text = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in text and "has expired" in text:
        return "renew the agent's certificate, or the CA: the agent reads its own again by itself"
    if "CERTIFICATE_VERIFY_FAILED" in text and "not yet valid" in text:
        return "is the clock right, here and there?  timedatectl tells"
    if "CERTIFICATE_VERIFY_FAILED" in text and "mismatch" in text:
        return "its certificate is for other names: issue one with the name or address of the URL"
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return "name the CA of the agents' certificates: verify=, --ca-file or WEIGHTSYNC_CA_FILE"
    if "ALERT" in text and ("CERT" in text or "UNKNOWN_CA" in text):
        return "this agent wants a certificate: cert=, --cert-file or WEIGHTSYNC_CERT_FILE"
    if "SSL" in text:
        return "does that agent speak TLS? --tls-cert makes it; else write http://"
    return None
