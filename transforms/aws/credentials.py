"""Credentials: who we are to AWS. From the default chain, with a role assumed if one is asked for.

No Beam. Nothing is kept here that could be pickled with a secret in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import botocore.exceptions as aws_errors
from botocore.config import Config
from botocore.credentials import (
    AssumeRoleCredentialFetcher,
    AssumeRoleWithWebIdentityCredentialFetcher,
    DeferredRefreshableCredentials,
)
from botocore.session import Session

from transforms.aws.web_identity import google_token
from transforms.hidden import quiet

QUICK = Config(connect_timeout=4, read_timeout=10, retries={"total_max_attempts": 2})
"""For clients that credentials are asked of: half a minute at most, with the one repeat."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who to be. All of it may be told to anybody.

    Attributes:
        role_arn: Role to assume, or None.
        web_identity: Whose token the role is assumed with, ``google``; None for the chain's
            credentials.
        token_audience: Audience of that token.
        session_name: What AWS's logs call the session of the role.
        profile: Profile of AWS's shared files, or None for the one of the chain.
    """

    role_arn: str | None = None
    web_identity: str | None = None
    token_audience: str = "sts.amazonaws.com"
    session_name: str = "beam-lambda-sink"
    profile: str | None = None


def session_of(identity: Identity, region: str | None, settings: Config | None = None) -> Session:
    """A session with the credentials of who we are, renewed before they expire.

    Args:
        identity: Who we are.
        region: Where AWS is asked for the role's credentials; None for the chain's.
        settings: Of the clients that credentials are asked of; None for boto3's own.

    Raises:
        BotoCoreError: There are none, or what they are configured with does not fit.
    """
    source = _session(identity, settings)
    if not identity.role_arn:
        return source
    name = {"RoleSessionName": identity.session_name}
    create = partial(source.create_client, region_name=region)
    fetcher: Any
    if identity.web_identity:
        token = partial(google_token, identity.token_audience)
        fetcher = AssumeRoleWithWebIdentityCredentialFetcher(create, token, identity.role_arn, name)
    else:
        credentials = source.get_credentials()
        if credentials is None:
            raise aws_errors.NoCredentialsError
        fetcher = AssumeRoleCredentialFetcher(create, credentials, identity.role_arn, name)
    assumed = _session(identity, settings)
    # There is no public way to hand a session credentials that renew themselves.
    assumed._credentials = DeferredRefreshableCredentials(fetcher.fetch_credentials, "assume-role")
    return assumed


def _session(identity: Identity, settings: Config | None) -> Session:
    quiet()
    session = Session(profile=identity.profile)
    if settings is not None:
        session.set_default_client_config(settings)
    return session
