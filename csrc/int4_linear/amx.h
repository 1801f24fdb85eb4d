// Tile registers: results in 0 to 3, rows in 4 and 5, weights in 6 and 7. Include inside the AMX target region.
#pragma once

// GCC 12's intrinsics do not say what the instructions read: without these, writes of it may come later, or never.
#define MGT_TILE_BARRIER() asm volatile("" ::: "memory")
#define MGT_TILE_READS(address) asm volatile("" ::"r"(address) : "memory")

namespace mgt {
namespace {

// Configures the tile registers of this thread as long as it lives: 16 rows of results, and steps of `bytes` bytes
// along the inputs.
class TileSession {
 public:
  explicit TileSession(int64_t bytes) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = i == 4 || i == 5 ? static_cast<uint16_t>(bytes) : 64;
      config.rows[i] = i >= 6 ? static_cast<uint8_t>(bytes / 4) : 16;
    }
    MGT_TILE_READS(&config);
    _tile_loadconfig(&config);
  }
  ~TileSession() { _tile_release(); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

}  // namespace
}  // namespace mgt
