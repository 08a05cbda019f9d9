"""A real Kafka broker with a listener for each way to log in, beside the plain one.

What is written and read by the tests goes by the plain one. Certificates are made here, and the
classes that take tokens, `java/*.java`, are compiled here.
"""

from __future__ import annotations

import datetime
import ipaddress
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from confluent_kafka.admin import (
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from pipeline.local.broker import KafkaBroker
from pipeline.local.jars import classpath
from pipeline.local.processes import ServerError, free_ports
from tests.sink import ACCESS_KEY, SECRET_KEY

REGION = "us-east-1"
TOKEN_SECRET, SCOPE = "secret-of-the-token-server", "kafka"
NO_RIGHTS, NO_RIGHTS_SECRET = "AKIDWITHOUTRIGHTS", "secret-of-who-has-no-rights"

USER, PASSWORD = "orders", "password-for-tests"

_LISTENERS = {
    "iam": "SASL_SSL",
    "scram": "SASL_SSL",
    "plain": "SASL_SSL",
    "mtls": "SSL",
    "oidc": "SASL_SSL",
}
_SECURITY = "org.apache.kafka.common.security"
_BEARER = f"{_SECURITY}.oauthbearer.OAuthBearerLoginModule"
_SCRAM = f"{_SECURITY}.scram.ScramLoginModule"
_PLAIN = f"{_SECURITY}.plain.PlainLoginModule"
_SOURCES = Path(__file__).parent / "java"


class Authority:
    """Makes keys and certificates for 127.0.0.1.

    Args:
        folder: Where the files go.

    Attributes:
        ca: File with the certificate to trust.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = rsa.generate_private_key(65537, 2048)
        # Two of one name would be taken for one another.
        name = f"tests {folder.name}"
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.ca = folder / "ca.pem"
        self.ca.write_bytes(_pem(self._sign(self._name, self._key, authority=True)))

    def issue(self, name: str, password: str | None = None) -> tuple[str, str]:
        """A certificate, and its key as PKCS#8, encrypted if there is a password; both PEM."""
        key = rsa.generate_private_key(65537, 2048)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        return _pem(self._sign(subject, key)).decode(), key_text(key, password)

    def _sign(
        self, subject: x509.Name, key: rsa.RSAPrivateKey, authority: bool = False
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.timezone.utc)
        names = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def key_text(key: rsa.RSAPrivateKey, password: str | None = None) -> str:
    """A key as PKCS#8 in PEM, encrypted if there is a password."""
    how: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password:
        how = serialization.BestAvailableEncryption(password.encode())
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how
    ).decode()


class SecureBroker(KafkaBroker):
    """`KafkaBroker` with TLS and logins.

    Who logs in as somebody else than `ACCESS_KEY` may do nothing.

    Args:
        reauthenticate_secs: How long a connection is good for at most, whatever the token says.

    Attributes:
        authority: Of the certificates.
        ca: File with the certificate to trust.
        iam: ``host:port`` of the listener that takes tokens as MSK does.
        logins: File with a line for each login with IAM.
        scram: Of the listener that takes SCRAM of `USER`, in which a connection has to log in
            again every two seconds.
        plain: The one that takes PLAIN of `USER`; here, too, every two seconds.
        mtls: The one that takes certificates of `authority` for `USER`.
        oidc: The one that takes tokens signed with `TOKEN_SECRET` for `USER`.
    """

    def __init__(self, reauthenticate_secs: float = 3600) -> None:
        # Certificates take time, too, and on a busy machine all takes any.
        super().__init__(start_timeout=240)
        self._certificates = tempfile.TemporaryDirectory(prefix="secure-")
        folder = Path(self._certificates.name)
        self.authority = Authority(folder)
        self.ca = self.authority.ca
        certificate, key = self.authority.issue("broker")
        (folder / "broker.pem").write_text(key + certificate)
        keys = folder / "keys.txt"
        keys.write_text(f"{ACCESS_KEY} {SECRET_KEY}\n{NO_RIGHTS} {NO_RIGHTS_SECRET}\n")
        self.logins = folder / "logins.txt"
        self.logins.write_text("")
        self._extensions = folder / "extensions.txt"
        self._users = folder / "users.txt"
        self.set_password("plain", PASSWORD)
        self._clients_ca = folder / "clients.pem"
        self._clients_ca.write_bytes(self.ca.read_bytes())
        self._classes = folder / "classes"
        _compile(self._classes)
        self._jvm_flags = (
            *self._jvm_flags,
            f"-Dmsk.region={REGION}",
            f"-Dmsk.keys={keys}",
            f"-Dmsk.log={self.logins}",
            f"-Dplain.users={self._users}",
            f"-Djwt.secret={TOKEN_SECRET}",
            f"-Djwt.scope={SCOPE}",
            f"-Djwt.log={self._extensions}",
        )
        self.iam, self.scram, self.plain, self.mtls, self.oidc = (
            f"127.0.0.1:{port}" for port in free_ports(5)
        )
        config = self._config
        for name, protocol in _LISTENERS.items():
            address = f",{name.upper()}://{getattr(self, name)}"
            config["listeners"] += address
            config["advertised.listeners"] += address
            config["listener.security.protocol.map"] += f",{name.upper()}:{protocol}"
        config |= {
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(folder / "broker.pem"),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(self.ca),
            "listener.name.iam.sasl.enabled.mechanisms": "OAUTHBEARER",
            "listener.name.iam.oauthbearer.sasl.jaas.config": f"{_BEARER} required;",
            "listener.name.iam.oauthbearer.sasl.server.callback.handler.class": "MskValidator",
            "listener.name.iam.oauthbearer.connections.max.reauth.ms": str(
                int(reauthenticate_secs * 1000)
            ),
            "listener.name.scram.sasl.enabled.mechanisms": "SCRAM-SHA-256,SCRAM-SHA-512",
            "listener.name.scram.scram-sha-256.sasl.jaas.config": f"{_SCRAM} required;",
            "listener.name.scram.scram-sha-512.sasl.jaas.config": f"{_SCRAM} required;",
            "listener.name.plain.sasl.enabled.mechanisms": "PLAIN",
            "listener.name.plain.plain.sasl.jaas.config": f"{_PLAIN} required;",
            "listener.name.plain.plain.sasl.server.callback.handler.class": "PlainValidator",
            "listener.name.plain.plain.connections.max.reauth.ms": "2000",
            "listener.name.mtls.ssl.client.auth": "required",
            "listener.name.mtls.ssl.truststore.location": str(self._clients_ca),
            "listener.name.oidc.sasl.enabled.mechanisms": "OAUTHBEARER",
            "listener.name.oidc.oauthbearer.sasl.jaas.config": f"{_BEARER} required;",
            "listener.name.oidc.oauthbearer.sasl.server.callback.handler.class": "JwtValidator",
            "listener.name.oidc.oauthbearer.connections.max.reauth.ms": "3600000",
            **{
                f"listener.name.scram.{mechanism}.connections.max.reauth.ms": "2000"
                for mechanism in ("scram-sha-256", "scram-sha-512")
            },
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": f"User:ANONYMOUS;User:{ACCESS_KEY};User:{USER};User:CN={USER}",
        }

    def accepted(self) -> int:
        """How many logins with IAM there were."""
        return sum(" accepted " in line for line in self.logins.read_text().splitlines())

    def extensions(self) -> set[str]:
        """What clients with tokens of `TOKEN_SECRET` have said beside them."""
        return set(self._extensions.read_text().splitlines())

    def trust(self, authority: Authority) -> None:
        """Take certificates of clients from this authority only; it has to be started again."""
        self._clients_ca.write_bytes(authority.ca.read_bytes())

    def set_password(self, mechanism: str, password: str) -> None:
        """Have PLAIN, or SCRAM of 256 or 512, take this password of `USER`, and no other any
        more."""
        if mechanism == "plain":
            self._users.write_text(f"{USER} {password}\n")
            return
        kind = getattr(ScramMechanism, f"SCRAM_SHA_{mechanism}")
        change = UserScramCredentialUpsertion(
            USER, ScramCredentialInfo(kind, 4096), password.encode()
        )
        self._client().alter_user_scram_credentials([change])[USER].result(30)

    def _command(self, folder: Path) -> Sequence[str]:
        command = list(super()._command(folder))
        at = command.index("-cp") + 1
        command[at] = f"{command[at]}:{self._classes}"
        return command


def _compile(folder: Path) -> None:
    done = subprocess.run(
        ["javac", "-cp", classpath("kafka"), "-d", str(folder), *map(str, _SOURCES.glob("*.java"))],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        raise ServerError(f"the validators cannot be compiled:\n{done.stdout[-4000:]}")
