"""Stage ``retrieve_r_ft``: r_ft/ and index/ -> retrieved_r_ft/.

    python -m radit_jax.main --config configs/retrieve_r_ft.py --config.encoder=FOLDER

The test questions once more, with the query encoder as R-FT left it and with those of
its controls; settings are those of ``retrieve``. Training keeps the passages of the
start: the two stages of RA-DIT are independent (section 3.3).
"""

from ml_collections import ConfigDict

from configs import r_ft, retrieve
from configs.base import base


def get_config(variant: str = "") -> ConfigDict:
    """The recipe of the stage alone."""
    config = base("retrieve_r_ft", variant)
    retrieve.section(config, variant)
    r_ft.section(config, variant)
    return config
