#define DIM 128
#include "decode_codes.inc"
