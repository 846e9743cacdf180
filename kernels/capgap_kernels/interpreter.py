"""Makes Triton's interpreter ready to run our kernels on a machine without a GPU."""

import os
import sys


def prepare_interpreter() -> None:
    """Set TRITON_INTERPRET=1, import triton, and mend it for numpy >= 2.4; call it before anything imports triton.

    Raises RuntimeError when triton was already imported without the interpreter: its own library is compiled then.
    """
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("triton was imported without TRITON_INTERPRET=1: set it before the process starts")
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    patch_lang_tensor = interpreter._patch_lang_tensor
    if patch_lang_tensor.__module__ == __name__:
        return

    # Triton 3.6 turns loop bounds into int(array of one element), which numpy 2.4 refuses.
    # TODO: drop when triton's interpreter calls .item() there.
    def patch_lang_tensor_for_numpy_24(tensor, scope) -> None:  # type: ignore[no-untyped-def]
        patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor_for_numpy_24

    # It stores bfloat16 as its bits and multiplies these as integers in tl.dot.
    # TODO: drop when triton's interpreter widens bfloat16 there as it does 8-bit floats.
    create_dot = interpreter.InterpreterBuilder.create_dot

    def create_dot_of_widened(self, a, b, d, *options):  # type: ignore[no-untyped-def]
        return create_dot(self, _widened(a), _widened(b), d, *options)

    interpreter.InterpreterBuilder.create_dot = create_dot_of_widened


def _widened(handle):  # type: ignore[no-untyped-def]
    """The same numbers in float32 when `handle` holds bfloat16; float32's upper half is bfloat16."""
    import numpy as np
    from triton import language as tl
    from triton.runtime.interpreter import TensorHandle

    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
