// Aligned scratch memory that a thread keeps for its next call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>

namespace ct::mlp {
namespace {

// Pieces of aligned memory that a thread puts by for its next scratch: what goes back to the system
// at each call has to be zeroed by it at the next.
class Spare {
 public:
  struct Piece {
    void* data = nullptr;
    size_t bytes = 0;
  };

  ~Spare() {
    for (const Piece& piece : pieces_) std::free(piece.data);
  }
  // A piece of at least so many bytes.
  Piece take(size_t bytes) {
    Piece* best = nullptr;
    for (Piece& piece : pieces_)
      if (piece.bytes >= bytes && (best == nullptr || piece.bytes < best->bytes)) best = &piece;
    if (best != nullptr) return std::exchange(*best, Piece{});
    return {std::aligned_alloc(64, bytes), bytes};
  }
  void put(Piece piece) {
    if (piece.bytes <= kMost)
      for (Piece& other : pieces_)
        if (other.bytes < piece.bytes) std::swap(piece, other);
    std::free(piece.data);
  }
  static Spare& of_thread() {
    static thread_local Spare spare;
    return spare;
  }

 private:
  static constexpr size_t kMost = 4 << 20;
  static constexpr int kCount = 6;  // of a net's panels and of a block
  Piece pieces_[kCount];
};

// Aligned scratch memory.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : piece_(Spare::of_thread().take((count * sizeof(T) + 127) / 64 * 64)) {
    if (piece_.data == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { Spare::of_thread().put(piece_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() { return static_cast<T*>(piece_.data); }

 private:
  Spare::Piece piece_;
};

}  // namespace
}  // namespace ct::mlp
