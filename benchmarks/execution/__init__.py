"""Compiled kernels executed without a GPU: an emulator of PTX as Triton emits it, in Python and NumPy.

    module = Module(text)                                                  # parse
    report = Report()
    launch(module, grid, values, dynamic_shared, regions, report)          # run; report.issues is what was found

``python -m benchmarks.execution`` runs every kernel of the package so, by public calls (``calls``), and records what it found
(``record``); ``plugin`` runs the project's tests so.

Several CTAs run side by side ("a group"); every register is one NumPy array with a value for each thread of the group
("lane"), or a scalar where all lanes are known to agree. Each basic block is translated, on first use, into a Python function;
there are two translations, one for when all lanes are there and one with a mask. Of lanes that have diverged those go on whose
block comes first in an order (``flow.ranks``) that brings both sides of a branch together where they meet.

What is checked, and collected in a ``Report`` with the PTX line and the Triton source line of the instruction:

    out of bounds   a byte outside the tensors of the launch, or, for strided tensors, between their elements; shared memory
    misaligned      an address that is no multiple of the access' whole width, vectors included
    uninitialised   shared memory read before it is written
    race            two lanes on the same bytes, one of them writing, with no bar.sync between them (bar.warp.sync counts within
                    a warp, shuffles do not); in global memory also two CTAs, which nothing orders within a launch
    pending         shared memory that a cp.async still fills, read or written before its wait; or that a wgmma still reads
    divergence      barriers, shuffles, matrix instructions that not all lanes of the warp (or of their mask) reach together;
                    lanes of one CTA that wait at barriers of different lines
    branches        that lanes of a CTA take differently, a hint alone: conditions of Triton's are of the whole CTA

Arithmetic: IEEE single and double as NumPy has them; fma rounds once (float32 by way of float64, whose double rounding is at
most 2^-29 of a unit off; float64 by error-free transforms). ``.approx`` instructions are computed exactly, rounded to float32,
subnormals flushed; with ``noise`` each result is moved by a share of its documented error. ptxas may contract a product and a
sum into fma; here that happens only with ``Module(text, contract=True)``, and within a block.

Not known: atomics, TMA, tcgen05, local memory, calls. The order in which CTAs run is fixed, and lanes of a block run in step,
so that a missing barrier shows as a race that is reported, not as a wrong value.
"""

from .launching import launch
from .module import Module
from .regions import Region, regions_of
from .report import Issue, Report

__all__ = ["Issue", "Module", "Region", "Report", "launch", "regions_of"]
