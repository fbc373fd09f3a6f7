"""Process groups, the platform under them, and our configuration as Megatron's.

Importing this package chooses the platform, which must happen before megatron.core is imported.
"""

from megatron_glmv.parallel import platform

platform.activate()
