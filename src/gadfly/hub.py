"""Why nothing can be opened by a model's name: told at once, where the Hub's client would try for minutes."""

import os
import time

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from gadfly.model_identity import may_be_hub_name

# It is asked twice, since a connection may fail once; its client asks six times for each of several files.
_PAUSE_SECONDS = 2.0


def why_not_there(name: str) -> str | None:
    """Why nothing can be opened by a name; None for a folder, and where the Hub has it or can be asked."""
    if os.path.isdir(name):
        return None
    if os.path.isfile(name):
        return "it is a file; give the folder of a model"
    if not may_be_hub_name(name):
        place = f" ({_shown(os.path.abspath(name))})" if name else ""
        return f"there is no such folder{place}"
    if _is_downloaded(name) or (failure := _unreachable(name)) is None:
        return None
    return (
        f"there is no such folder (a relative path counts from the recipe's folder, on the command line from "
        f"the current one), and the Hugging Face Hub cannot be asked for a model of that name: {failure}"
    )


def _is_downloaded(name: str) -> bool:
    try:
        found = [try_to_load_from_cache(name, file) for file in ("config.json", "adapter_config.json")]
    # Two hyphens or dots in a row; the client says so better when it is asked for it.
    except HFValidationError:
        return True
    return any(isinstance(file, str) for file in found)


def _unreachable(name: str) -> str | None:
    """Why the Hub gives no answer at all about a model; None if it does, whatever it is."""
    url = hf_hub_url(name, "config.json")
    for pause in (_PAUSE_SECONDS, 0.0):
        try:
            get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except HfHubHTTPError:
            return None
        except OfflineModeIsEnabled:
            return "HF_HUB_OFFLINE is set, and it was not downloaded before"
        except Exception as failure:
            # Which library the client speaks HTTP by depends on its version; each has errors of its own.
            reason = _shown((str(failure).strip() or repr(failure)).splitlines()[0])
            time.sleep(pause)
        else:
            return None
    return reason


def _shown(text: str) -> str:
    return text if text.isprintable() else repr(text)
