"""Property tests of this folder run without a deadline: the first call into torch or faiss takes longer than the rest."""

from hypothesis import settings

settings.register_profile("mmcli", deadline=None)
settings.load_profile("mmcli")
