#define DIM 160
#include "prefill.inc"
