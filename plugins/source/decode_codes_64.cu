#define DIM 64
#include "decode_codes.inc"
