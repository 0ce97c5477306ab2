/**
 * What a server's error says, in Chinese: by its code, which stays when its words change. In
 * English, and where a code is not known here, the server's own words are shown.
 */

import { language } from "./i18n";

const chinese: Record<string, string> = {
  // of a file
  encrypted: "文件受密码保护，或是旧的 .doc 格式：请另存为不带密码的副本（.docx）再上传",
  damaged: "文件已损坏，或过于复杂无法解析：请用原来的程序打开并重新保存",
  not_text: "这不是文本，或编码无法识别：请存为 UTF-8，或转换成 PDF",
  wrong_kind: "文件内容与扩展名不符",
  no_text: "里面没有文字：扫描件和图片需要先做文字识别（OCR）",
  too_large: "文件太大，或展开后太大：请拆分后再上传",
  too_slow: "读取超时：请拆分文件，或换一种格式保存",
  unsafe: "文件结构可疑，可能是攻击：请用 Word 重新保存后再试",
  not_read: "服务没能读取这个文件，文件本身未必有问题：请重新上传",
  partly: "有一部分没能读取",
  embedder_failed: "嵌入模型出错：请重新上传这个文件",
  unexpected: "发生意外错误，详情见服务的日志",
  // of a collection
  base_unreadable: "文档集无法读写：文件可能已损坏，或磁盘已满",
  embedder_unusable: "文档集的嵌入模型在这个服务上不可用，或与建立时的不同",
  name_taken: "已有同名的文档集",
  invalid_name: "名称只能有字母、汉字、数字、空格和 - _ .，最多 64 个字符，且不能以点开头",
  // of what is sent
  invalid_file_name: "这个文件名不能用：请改名后再上传",
  unsupported_file_type: "不支持这种文件",
  file_too_large: "文件超过了这个服务允许的大小",
  body_too_large: "发送的内容太多",
  file_busy: "另一个程序正在写这个文件，请稍后再试",
  disk_full: "服务所在的磁盘已满",
  model_not_found: "服务上没有这个模型",
  request_timeout: "回答用时超过了这个服务的限制",
  queue_full: "服务正忙，请稍后再试",
  revision_conflict: "这个对话已在别处改动",
  invalid_api_key: "密钥不对，或没有给出",
  host_not_allowed: "服务不接受这个主机名",
  origin_not_allowed: "服务不接受来自其他网站的请求",
};

export function worded(message: string, code: string | null): string {
  return (language.value === "zh" && code !== null && chinese[code]) || message;
}
