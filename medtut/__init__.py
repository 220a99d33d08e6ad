"""medtut: parameter-efficient fine-tuning for medical imaging, taught in code.

Importing the package loads nothing heavy; torch, MONAI and the rest are imported
by the modules that use them.
"""

__version__ = "0.1.0"
