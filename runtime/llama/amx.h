/* Compiled into llama.cpp ahead of its own sources (the Makefile says how): Intel AMX where GCC gets it wrong.
 *
 * GCC 12.2's `_tile_loadconfig` tells the compiler that 8 of the 64 bytes of a tile configuration are read (GCC bug
 * 114098), its `_tile_loadd` that no memory is. The stores that fill the rest may then be dropped, and matrix products
 * crash or are garbage. Here the instructions say what they read, whatever the compiler's own header says.
 * runtime/llama_handle.py looks for the symbol at the end: a library built for AMX without it must run without AMX.
 * Nothing here concerns other processors.
 */
#if defined(__AMX_TILE__) && !defined(DESKSIDE_LLAMA_AMX_H)
#define DESKSIDE_LLAMA_AMX_H
#include <immintrin.h>

#undef _tile_loadconfig
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg %0" ::"m"(*(const char(*)[64])(config)))

#define DESKSIDE_TILE_LOADD(tile, base, stride)                                                                        \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"((const void *)(base)), "r"((long)(stride)) : "memory")
#undef _tile_loadd
#define _tile_loadd(tile, base, stride) DESKSIDE_TILE_LOADD(tile, base, stride)

#ifdef __cplusplus
extern "C" {
#endif
__attribute__((weak, used, visibility("default"))) char deskside_amx_mended = 1;
#ifdef __cplusplus
}
#endif
#endif
