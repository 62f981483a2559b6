"""API keys: shown once, stored hashed, revocable."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from api_schemas.errors import InvalidRequest, NotFound
from job_store.database import make_engine, upgrade
from job_store.keys import KeyStore


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[KeyStore]:
    engine = make_engine(f"sqlite:///{tmp_path / 'k.db'}")
    upgrade(engine)
    yield KeyStore(engine)
    engine.dispose()


def test_a_key_is_recognised_until_it_is_revoked(keys: KeyStore) -> None:
    made = keys.create("laptop")
    assert made.secret.startswith("mp_")
    assert len(made.secret) == len("mp_") + 43  # 256 bits in base64
    known = keys.recognise(made.secret)
    assert known is not None
    assert known.id == made.id
    revoked = keys.revoke(made.id)
    assert revoked.revoked_at is not None
    assert keys.revoke(made.id) == revoked
    assert keys.recognise(made.secret) is None
    assert [key.name for key in keys.list()] == ["laptop"]


def test_the_secret_is_nowhere_in_the_database(keys: KeyStore, tmp_path: Path) -> None:
    secret = keys.create("one").secret
    with keys._engine.connect() as connection:
        connection.execute(text("PRAGMA wal_checkpoint(TRUNCATE)"))
    for file in tmp_path.iterdir():
        assert secret.encode() not in file.read_bytes()
        assert secret.removeprefix("mp_").encode() not in file.read_bytes()


@pytest.mark.parametrize("wrong", ["", "mp_", "mp_" + "A" * 43, "\udcff", "\0"])
def test_wrong_secrets(keys: KeyStore, wrong: str) -> None:
    keys.create("one")
    assert keys.recognise(wrong) is None


def test_a_key_has_scopes_and_an_owner(keys: KeyStore) -> None:
    made = keys.create("one", scopes=("read", "submit"), owner="anna")
    assert (made.scopes, made.owner) == (("submit", "read"), "anna")
    assert keys.create("two").scopes == ("admin",)


@pytest.mark.parametrize("owner", ["", "Anna", "a b", "-a", "a" * 65, "ä", "a\n", "../x"])
def test_names_that_no_owner_has(keys: KeyStore, owner: str) -> None:
    with pytest.raises(InvalidRequest, match="owner") as caught:
        keys.create("one", owner=owner)
    assert caught.value.code == "invalid_owner"


def test_a_key_without_a_scope_is_not_made(keys: KeyStore) -> None:
    with pytest.raises(InvalidRequest, match="admin, submit, infer, read") as caught:
        keys.create("one", scopes=())
    assert caught.value.code == "no_scopes"


def test_an_unknown_key_cannot_be_revoked(keys: KeyStore) -> None:
    with pytest.raises(NotFound, match="key_none") as caught:
        keys.revoke("key_none")
    assert caught.value.code == "key_not_found"
