"""By which methods can a head's part in suppressing refusal be measured?

The package's own methods, in the order of the documentation. Others come from entry points of the group
`cliffscope.methods`, by `package.module:name`, or as an object.
"""

from cliffscope.heads.ablation import Mean, NormPreserving, Resample, Scale, Zero
from cliffscope.heads.attribution import Attribution
from cliffscope.heads.greedy import Greedy
from cliffscope.heads.methods import Method
from cliffscope.heads.patching import Patch, PatchReverse
from cliffscope.heads.shares import CliffShare, DirectShare
from cliffscope.registry import Registry

METHODS: Registry[Method] = Registry(kind="method", group="cliffscope.methods", expected=Method)
"""Every method by name."""

for _method in (
    *(Zero(), Mean(), Resample(), Scale(), NormPreserving(), Patch(), PatchReverse()),
    *(Greedy(), Attribution(), DirectShare(), CliffShare()),
):
    METHODS.register(_method.name, _method)
