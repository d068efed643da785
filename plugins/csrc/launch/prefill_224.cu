#define DIM 224
#include "prefill.inc"
