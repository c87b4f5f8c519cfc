"""`safegraft provenance`: keys that sign results. `check` is `safegraft verify` for what they signed."""

from pathlib import Path
from typing import Annotated

import typer

from safegraft.commands.terminal import Json, err, out, plain, print_json
from safegraft.dsse import make_keys
from safegraft.errors import InvalidParameter
from safegraft.verification import Evidence, check_provenance

app = typer.Typer(help="Keys that sign where results come from.", no_args_is_help=True)
SIGNATURES = {
    "valid": "Signature: valid, by the key {keyid}.",
    "invalid": "Signature: NOT of the key {keyid}.",
    "unsigned": "Unsigned: nothing shows who made this statement.",
    "not checked": "Signature not checked: give --public-key to know who made this statement.",
}


@app.command("keygen")
def keygen(
    to: Annotated[Path, typer.Option("--out", envvar="SAFEGRAFT_OUT", help="A folder; made where it is missing.")],
    as_json: Json = False,
) -> None:
    """Makes an Ed25519 key: OUT/signing_key.pem, for workers alone, and OUT/signing_key.pub.pem, for everybody."""
    private, public, keyid = make_keys(to)
    if as_json:
        print_json({"private": str(private), "public": str(public), "keyid": keyid})
        return
    err.print(f"Give {private} to workers as SAFEGRAFT_SIGNING_KEY, and {public} to everybody.", soft_wrap=True)
    out.print(keyid, highlight=False, soft_wrap=True)


def check(body: bytes, evidence: Evidence, as_json: bool) -> int:
    """Prints what was and what was not checked; the exit status. Raises InvalidParameter where nothing is given."""
    if evidence == Evidence():
        raise InvalidParameter(
            "Nothing was given that could be checked.",
            hint="Name --adapter, and --public-key, --report, --side-cars, --input or --reference.",
        )
    found = check_provenance(body, evidence)
    keyid = evidence.key.keyid if evidence.key is not None else None
    if as_json:
        print_json(
            {
                "ok": not found.problems,
                "problems": found.problems,
                "signature": found.signature,
                "keyid": keyid,
                "checked": found.checked,
                "not_checked": found.unchecked,
            }
        )
    else:
        # Names come out of a file that somebody sent: nothing in them is markup or moves the cursor.
        out.print(SIGNATURES[found.signature].format(keyid=keyid), markup=False, highlight=False, soft_wrap=True)
        for word, lines in (("As attested", found.checked), ("Not checked", found.unchecked)):
            for line in lines:
                out.print(plain(f"{word}: {line}"), markup=False, highlight=False, soft_wrap=True)
        for line in found.problems:
            out.print(plain(f"Differs: {line}"), markup=False, highlight=False, style="red", soft_wrap=True)
        if not found.problems:
            out.print(f"The provenance holds for {len(found.checked)} files.", markup=False, highlight=False)
    return 1 if found.problems else 0
