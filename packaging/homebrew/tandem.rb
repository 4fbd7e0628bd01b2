# Builds from source. Never tried: nobody here has a Mac.
class Tandem < Formula
  desc "Runs very large mixture-of-experts language models from low-bit checkpoints"
  license any_of: ["MIT", "Apache-2.0"]
  # url, sha256 and homepage: of the published archive of the source.
  head ".", branch: "main"

  depends_on "rust" => :build

  def install
    system "cargo", "install", "--locked", "--features", "wgpu", "--path", "crates/tandem", "--root", prefix
    generate_completions_from_executable(bin/"tandem", "completions", shells: [:bash, :zsh, :fish])
    system bin/"tandem", "man", man1
    (pkgshare/"models").install "models/fable-30m-MXFP4-Q8"
  end

  service do
    run [opt_bin/"tandem", "serve"]
    keep_alive true
  end

  test do
    assert_match "Tokyo", shell_output("#{bin}/tandem run --temperature 0 --model #{pkgshare}/models/fable-30m-MXFP4-Q8 " \
                                       "'What is the capital of Japan?'")
  end
end
