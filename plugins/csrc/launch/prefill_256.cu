#define DIM 256
#include "prefill.inc"
