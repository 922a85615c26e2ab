// An engine without a model, for tests of what is around engines. A slot's memory is a ring of the first pixels of its
// last frames; every number of every output is the sum of those that a real ring would let it see. A frame of 255 gives NaN.
#pragma once

namespace framestep::fake {

constexpr int WINDOW = 8;  // frames

// The n-th call of any engine's functions from now on fails, once; 0: none.
void fail_call(long n);
long failures();  // so far

// Runs begin and then wait, until let_go.
void hold_runs();
void wait_for_a_held_run();
void let_go();

}  // namespace framestep::fake
